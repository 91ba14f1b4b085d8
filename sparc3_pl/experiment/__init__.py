"""A whole experiment from one file, in stages that are not done twice."""
