"""`keyreeve doctor`: looks at an installation as it is, and says of each thing that is wrong what to do."""
