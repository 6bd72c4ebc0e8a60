"""The published names of other packages, on top of this one: nothing outside of this folder imports it."""
