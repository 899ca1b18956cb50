"""The fast text beside the plain one: less memory for the backward pass, attention and convolutions with less work."""
