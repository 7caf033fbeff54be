"""Reports: what a run folder holds, as one page that one can look at."""
