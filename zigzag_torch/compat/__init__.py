"""Published names of other packages, on top of this one: no module outside of this folder imports it."""
