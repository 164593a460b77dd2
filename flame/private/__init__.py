"""Names that other libraries promise nowhere and that this project uses, a module for each library.

A new release may drop any of them. `tests/flame/private` looks each one up in what is installed,
and holds the code to use no other: so a release that drops one is seen before a user meets it.
"""
