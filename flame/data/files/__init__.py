"""Documents in files.

- `local_files`: which files of a folder are read, and which are left out.
- `blocks`: a part of a file that is read in one piece, and what is read of it.
- `parquet`, `lines`, `whole`: the formats, as blocks.
- `bad_rows`: counting what is no document.
- `prepared`: all documents of some files as one set that can be indexed.
- `dealt`: blocks dealt out to virtual shards, for streams.
- `saved_folder`: folders that the `datasets` library saved.
"""
