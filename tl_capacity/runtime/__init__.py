"""The process: which of several it is, what it says while it runs, and the memory that it keeps."""
