"""Two maps as a user would register them: radial lens distortion, and log-polar sampling."""

import math

import torch
import triton
import triton.language as tl

import tri_stn


@triton.jit
def radial(theta, point):
    """Brown–Conrady: the undistorted point (x, y) is found at (x, y) (1 + k1 r² + k2 r⁴)."""
    square = point[0] * point[0] + point[1] * point[1]
    factor = 1 + square * (theta[0] + square * theta[1])
    return point[0] * factor, point[1] * factor


@triton.jit
def radial_vjp(theta, point, grad):
    square = point[0] * point[0] + point[1] * point[1]
    factor = 1 + square * (theta[0] + square * theta[1])
    along = grad[0] * point[0] + grad[1] * point[1]
    slope = 2 * along * (theta[0] + 2 * square * theta[1])
    grad_point = (grad[0] * factor + slope * point[0], grad[1] * factor + slope * point[1])
    return (along * square, along * square * square), grad_point


def radial_in_torch(theta, point):
    square = point[0] ** 2 + point[1] ** 2
    factor = 1 + square * (theta[0] + square * theta[1])
    return point[0] * factor, point[1] * factor


@triton.jit
def barrel(theta, point):
    """The other sign, of one coefficient alone."""
    factor = 1 - (point[0] * point[0] + point[1] * point[1]) * theta[0]
    return point[0] * factor, point[1] * factor


@triton.jit
def barrel_vjp(theta, point, grad):
    square = point[0] * point[0] + point[1] * point[1]
    factor = 1 - square * theta[0]
    along = grad[0] * point[0] + grad[1] * point[1]
    slope = -2 * along * theta[0]
    grad_point = (grad[0] * factor + slope * point[0], grad[1] * factor + slope * point[1])
    return (-along * square, along * 0), grad_point


def barrel_in_torch(theta, point):
    factor = 1 - (point[0] ** 2 + point[1] ** 2) * theta[0]
    return point[0] * factor, point[1] * factor


@triton.jit
def log_polar(theta, point):
    """Around (x, y), the angle along the output's x and the logarithm of the radius along its y."""
    angle = point[0] * 3.141592653589793
    r = theta[2] * tl.exp((point[1] - 1) * theta[3])
    return theta[0] + r * tl.cos(angle), theta[1] + r * tl.sin(angle)


@triton.jit
def log_polar_vjp(theta, point, grad):
    angle = point[0] * 3.141592653589793
    shrink = tl.exp((point[1] - 1) * theta[3])
    r = theta[2] * shrink
    grad_r = grad[0] * tl.cos(angle) + grad[1] * tl.sin(angle)
    grad_angle = r * (grad[1] * tl.cos(angle) - grad[0] * tl.sin(angle))
    grad_theta = (grad[0], grad[1], grad_r * shrink, grad_r * r * (point[1] - 1))
    return grad_theta, (grad_angle * 3.141592653589793, grad_r * r * theta[3])


def log_polar_in_torch(theta, point):
    angle, r = math.pi * point[0], theta[2] * torch.exp((point[1] - 1) * theta[3])
    return theta[0] + r * angle.cos(), theta[1] + r * angle.sin()


RadialDistortion = tri_stn.register_transform(
    "radial_distortion", radial, radial_vjp, radial_in_torch, ("k1", "k2"), example=(0.1, -0.05)
)
LogPolar = tri_stn.register_transform(
    "log_polar", log_polar, log_polar_vjp, log_polar_in_torch, {"centre": 2, "radius": 1, "rate": 1}
)
