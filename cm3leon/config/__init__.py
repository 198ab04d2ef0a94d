"""Parameters: their schema, the profiles they are written from, and the paths that stages read and write."""
