"""The process: which of several it is, what it logs while it runs, and the memory it keeps."""
