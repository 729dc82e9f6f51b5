"""Uniform and normal numbers from a secret key, with the same bits on every machine.

ChaCha20 gives 64 bits per number, so any stretch of a stream can be drawn separately. Everything
else is integer arithmetic and + - * / sqrt, which IEEE 754 fixes to the last bit; ``log`` and
``cos`` are avoided because their last bit differs between processors. Measured: 30 to 50 million
normals per second and core (AMD EPYC). Memory is bounded by the requested stretch.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_BLOCK = 1 << 13  # numbers per step, so that every temporary stays in the L2 cache
_CIPHER_BLOCK = 64  # bytes
_SPAN = 1 << 35  # numbers under one nonce: the block counter has 32 bits

# M. J. Wichura, Algorithm AS 241 (PPND16), Applied Statistics 37 (1988) 477-484; relative error
# about 1e-16. Numerator and denominator, highest power first, of the three branches.
_CENTRE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
_MIDDLE = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
_FAR = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ),
)
_LN2 = 0.6931471805599453094
_SQRT_HALF = 0.70710678118654752440
_ATANH = tuple(1.0 / k for k in range(25, 0, -2))  # atanh(s) / s in powers of s^2


def uniforms(key: bytes, start: int, count: int) -> Floats:
    """Return numbers ``start .. start + count`` of the stream of ``key`` (32 bytes), (count,)
    float64, uniform in (0, 1).

    Each is (n + 1/2) / 2^52, so 0, 1/2 and 1 never occur.
    """
    low = start
    parts = []
    while low < start + count:
        high = min(start + count, low - low % _SPAN + _SPAN)
        parts.append(_keystream(key, low, high - low))
        low = high
    stream = b"".join(parts)
    bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
    bits |= np.uint64(0x3FF0000000000000)  # the float64 1 + n / 2^52
    values = bits.view(np.float64)
    values -= 1.0
    values += 2.0**-53
    return values


def _keystream(key: bytes, start: int, count: int) -> bytes:
    """Return 8 bytes for each of ``count`` numbers, all in one span; a span is the nonce."""
    span, place = divmod(start, _SPAN)
    counter, skip = divmod(8 * place, _CIPHER_BLOCK)
    nonce = counter.to_bytes(4, "little") + span.to_bytes(12, "little")
    cipher = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    return cipher.update(bytes(skip + 8 * count))[skip:]


def normals(key: bytes, start: int, count: int) -> Floats:
    """Return the stretch of :func:`uniforms` as standard normals, (count,) float64, |z| < 8.3."""
    values = np.empty(count)
    for low in range(0, count, _BLOCK):
        high = min(low + _BLOCK, count)
        values[low:high] = inverse_normal(uniforms(key, start + low, high - low))
    return values


def inverse_normal(p: Floats) -> Floats:
    """Return z with P(Z < z) = p for a standard normal Z; ``p`` is (n,) float64 in (0, 1)."""
    q = p - 0.5
    r = q * q
    np.subtract(0.180625, r, out=r)
    z = _rational(_CENTRE, r)
    z *= q
    tails = np.flatnonzero(np.abs(q) > 0.425)
    if tails.size:
        tail = p[tails]
        r = np.sqrt(-_log(np.minimum(tail, 1.0 - tail)))
        magnitude = _rational(_MIDDLE, r - 1.6)
        far = np.flatnonzero(r > 5.0)
        if far.size:
            magnitude[far] = _rational(_FAR, r[far] - 5.0)
        z[tails] = np.copysign(magnitude, q[tails])
    return z


def _log(x: Floats) -> Floats:
    """Return the logarithm of positive normal float64: exponent, then 2 atanh((m-1) / (m+1))."""
    bits = x.view(np.uint64)
    exponent = (bits >> np.uint64(52)).astype(np.float64)
    exponent -= 1022.0
    mantissa = ((bits & np.uint64(0x000FFFFFFFFFFFFF)) | np.uint64(0x3FE0000000000000)).view(
        np.float64
    )  # in [1/2, 1)
    small = mantissa < _SQRT_HALF
    exponent -= small
    mantissa *= 1.0 + small
    s = (mantissa - 1.0) / (mantissa + 1.0)
    result = _horner(_ATANH, s * s)
    result *= s
    result *= 2.0
    exponent *= _LN2
    result += exponent
    return result


def _rational(branch: tuple[tuple[float, ...], tuple[float, ...]], r: Floats) -> Floats:
    value = _horner(branch[0], r)
    value /= _horner(branch[1], r)
    return value


def _horner(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Evaluate a polynomial, highest power first; products and sums are rounded separately."""
    value = x * coefficients[0]
    for c in coefficients[1:-1]:
        value += c
        value *= x
    value += coefficients[-1]
    return value
