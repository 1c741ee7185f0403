"""The ranks: their place in the run, their meeting, agreements and end, and the detection of a lost one."""
