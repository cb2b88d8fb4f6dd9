"""Recipes of other frameworks, read and written as one of this trainer's, with all that is lost or changed on the way."""
