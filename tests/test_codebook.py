import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln

from hf_turboquant.codebook import INT8, lloyd_max

# exact Lloyd-Max distortion on the sphere
DISTORTION = {
    1: (0.358387, 0.360889, 0.362136),
    2: (0.114526, 0.116000, 0.116740),
    3: (0.033391, 0.033966, 0.034256),
    4: (0.009132, 0.009315, 0.009408),
}
GAUSSIAN_CENTROIDS = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}


@pytest.mark.parametrize("nbits", DISTORTION)
@pytest.mark.parametrize(("column", "head_dim"), list(enumerate((64, 128, 256))))
def test_distortion_is_that_of_lloyd_max(nbits, column, head_dim):
    # the int8 grid of 2-4 bits may cost half a percent
    assert lloyd_max(nbits, head_dim).distortion == pytest.approx(DISTORTION[nbits][column], rel=0.005)


@pytest.mark.parametrize("nbits", GAUSSIAN_CENTROIDS)
def test_centroids_near_the_gaussian_limit(nbits):
    positive = np.sort(lloyd_max(nbits, 576).centroids)[2 ** (nbits - 1) :] * np.sqrt(576)
    # the int8 grid moves single values by up to 2.5 %, at next to no cost in distortion
    np.testing.assert_allclose(positive, GAUSSIAN_CENTROIDS[nbits], rtol=0.025)


@pytest.mark.parametrize(("nbits", "head_dim"), [(2, 16), (3, 80), (4, 64), (1, 96)])
def test_distortion_by_brute_force_integration(nbits, head_dim):
    book = lloyd_max(nbits, head_dim)
    values = np.sort(book.centroids)
    edges = [-1.0, *book.boundaries, 1.0]
    log_norm = gammaln(head_dim / 2) - gammaln((head_dim - 1) / 2) - 0.5 * np.log(np.pi)

    def error(t, value):
        return (t - value) ** 2 * np.exp(log_norm) * (1 - t * t) ** ((head_dim - 3) / 2)

    total = sum(
        quad(error, low, high, args=(value,), epsabs=1e-14)[0]
        for low, high, value in zip(edges[:-1], edges[1:], values, strict=True)
    )
    assert head_dim * total == pytest.approx(book.distortion, rel=1e-4)


@pytest.mark.parametrize("nbits", range(1, 5))
def test_codes_name_every_value_once(nbits):
    book = lloyd_max(nbits, 128)
    assert sorted(book.ranks_to_codes) == list(range(2**nbits))
    ascending = book.centroids[book.ranks_to_codes]
    assert (np.diff(ascending) > 0).all()
    np.testing.assert_allclose(ascending, -ascending[::-1])
    np.testing.assert_allclose(book.boundaries, (ascending[1:] + ascending[:-1]) / 2)


@pytest.mark.parametrize("nbits", (1, 2, 3, 4))
def test_kernel_widths_are_int8_levels_times_a_scale(nbits):
    book = lloyd_max(nbits, 128)
    assert book.levels.dtype == np.int8
    np.testing.assert_allclose((book.levels + book.offset) * book.scale, book.centroids, rtol=1e-12)


def test_four_bits_are_sign_and_magnitude():
    book = lloyd_max(4, 128)
    assert book.offset == 0.5
    np.testing.assert_array_equal(book.levels[8:], ~book.levels[:8])
    np.testing.assert_allclose(book.centroids[8:], -book.centroids[:8])


def test_eight_bits_are_bytes_in_twos_complement():
    codes = np.arange(-128, 128)
    np.testing.assert_array_equal(INT8.levels[codes & 255], codes)
    np.testing.assert_array_equal((INT8.levels + INT8.offset) * INT8.scale, INT8.centroids)


@pytest.mark.parametrize(("nbits", "head_dim"), [(5, 64), (8, 64), (-1, 64), (4, 8)])
def test_out_of_range(nbits, head_dim):
    with pytest.raises(ValueError, match="must be"):
        lloyd_max(nbits, head_dim)
