"""Merging the rounds' weights into one set, and searching the interpolation coefficients."""
