"""A package of a user's own, as small as one can be: what the tests of the command line train."""
