"""Language-model tasks: an lm-eval model of ours, and the tasks that it is measured on."""
