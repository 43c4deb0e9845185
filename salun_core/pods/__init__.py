"""The steps of a run as the pods of a pipeline do them: references in, references out, and an outcome."""
