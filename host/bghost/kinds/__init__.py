"""The kinds of worker that come along with bghost."""
