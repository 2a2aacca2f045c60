"""Stage `teacher`: the model to distil, trained here when it is tiny, fetched and checked when it is not."""
