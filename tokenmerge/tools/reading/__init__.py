"""Reading of files that may be damaged or hostile: one function for each kind of file, with limits and one error."""
