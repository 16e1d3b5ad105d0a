// Every operator of pyprune: the table of contents. Implementations register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyprune, m) {
  // Masks that drop exactly the removed[0] smallest scores of all weights together, or, with one count per
  // weight, the removed[i] smallest of each. Score: |w|, or |w| * scales[i]. Returns non-finite counts, int64 [n].
  m.def("threshold(Tensor[] weights, Tensor? scales, int[] removed, Tensor(a!)[] masks) -> Tensor");

  // L2 norm of each tensor, accumulated in float64 in a fixed order: float64 [n].
  m.def("norms(Tensor[] tensors) -> Tensor");

  // weights[i][~masks[i]] = 0, in place.
  m.def("fold(Tensor(a!)[] weights, Tensor[] masks) -> ()");

  // Number of elements equal to zero (False for bool) in each tensor: int64 [n].
  m.def("count_zeros(Tensor[] tensors) -> Tensor");
}
