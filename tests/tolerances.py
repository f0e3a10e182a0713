"""How far two ways to one number may lie apart, with the reason: theory, or the largest difference that was measured.

Measured means: over the code paths of one processor (as it is, ATEN_CPU_CAPABILITY=default and avx2, MKL_CBWR=COMPATIBLE
with ONEDNN_MAX_CPU_ISA=SSE41), one and two threads, and several seeds, since the luck of one seed is not a bound. A
tolerance is about three times the largest difference. All are relative: largest difference over largest wanted number.
The readout's own table stands in readout/conftest.py, that of jets in jets/agreement.py.
"""

TOLERANCES = {
    # Scores of float64 models are float32 numbers: 2^-24 of each, and float64 sums in another order.
    "float64 scores": 1e-6,
    # Gradients of a float32 llama of two layers are off by up to 4e-6 of their length; of products the largest
    # difference was 1.8e-6 (dot, TracIn), of cosines 8e-7, over four to five seeds.
    "float32 gradients": 1e-5,
    # A difference of losses loses digits: float32 losses of about 6 nats that differ by 0.1.
    "differences of losses": 1e-3,
    # One rounding to 11 bits for each number that is kept, on both sides of a product of unit length.
    "float16 sketches": 2e-3,
    # What a linear model of one short step leaves out: the second order.
    "second order": 1e-3,
    # Derivatives in float64, in another order of operations.
    "float64 derivatives": 1e-9,
    # Likewise, of llama, whose norms compute in float32 whatever the model's numbers are, and are left out of jets:
    # effects differed by up to 7e-6 over eight seeds (3e-7 is usual), losses by 9e-8.
    "derivatives through float32 norms": 2e-5,
    "losses through float32 norms": 5e-7,
    # Central differences at weights 1 -+ h, h = 1e-4: the cubic term, h^2, and rounding, 1e-16 / h.
    "differences of retrainings": 1e-6,
}
