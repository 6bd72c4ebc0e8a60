"""The words in which both front ends refuse the derivatives that no backend computes."""

UNSUPPORTED_DERIVATIVE = (
    "zigzag attention: expected first derivatives in reverse mode (backward, grad, vjp, jacrev), got forward mode "
    "(jvp, jacfwd, linearize, dual numbers, hvp) or a second derivative, which no backend computes"
)
