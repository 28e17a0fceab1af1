"""Which keys there are, where they live, and who may use them. It holds sealed records only: nothing in it opens a key."""
