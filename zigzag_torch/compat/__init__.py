"""The published names of other packages, built on this package; no module outside of this folder imports them."""
