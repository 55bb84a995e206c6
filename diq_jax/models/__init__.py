"""Decoders and encoders as functions of parameter trees, and the files of both."""
