"""A whole stack under mixed load for as long as one likes, audited all the while."""
