"""The tasks that come with Sheaf, a file each."""
