"""The page of a run: `<output_dir>/report.html`, from the files that the run has written."""
