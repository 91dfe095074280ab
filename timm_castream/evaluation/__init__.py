"""An evaluation's parts: the protocol of a batch, the images, the run that resumes, the intervals and the report."""
