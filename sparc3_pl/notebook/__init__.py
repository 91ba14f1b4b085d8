"""What ``import sparc3_pl`` offers to those who have a model loaded: the commands as functions, in memory."""
