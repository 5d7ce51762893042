"""One runnable recipe a file; its docstring says the claim, the command, and what to expect."""
