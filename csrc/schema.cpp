// Every operator of pyprune: the table of contents. Implementations register themselves in cpu/ and cuda/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyprune, m) {
  // Masks that drop exactly the removed[0] smallest scores of all weights together, or, with one count per
  // weight, the removed[i] smallest of each. Score: |w|, or |w| * scales[i]. bases are empty or one or none per
  // weight: what is False in one goes first and is never kept; on CUDA it is laid out as its mask. Returns non-finite
  // counts, int64 [n].
  m.def("threshold(Tensor[] weights, Tensor? scales, int[] removed, Tensor(a!)[] masks, Tensor?[] bases) -> Tensor");

  // The same of all weights together with the score |w| / ||w||_2, read once. For the CPU, and not for float64:
  // elsewhere, threshold takes norms.
  m.def("normalized_threshold(Tensor[] weights, int removed, Tensor(a!)[] masks, Tensor?[] bases) -> Tensor");

  // Masks that keep the kept[i] largest of each sizes[i] neighbours in a row of weight i, whose first row_dims[i]
  // dimensions say which row. Score: |w|, or |w| * factors[i][column]; where bases[i] is False nothing stays. Returns
  // non-finite counts, int64 [n].
  m.def(
      "group_masks(Tensor[] weights, int[] sizes, int[] kept, int[] row_dims, Tensor?[] factors, Tensor?[] bases, "
      "Tensor(a!)[] masks) -> Tensor");

  // L2 norm of each tensor, accumulated in float64 in a fixed order: float64 [n].
  m.def("norms(Tensor[] tensors) -> Tensor");

  // Per block of each tensor the sum (reduction 0), mean (1) or maximum (2) of |x|^p, or of x without p. `blocks` has
  // the sizes of the first tensor's blocks, then the second's. float64 for float64 and bool, float32 for the others.
  m.def("unit_scores(Tensor[] tensors, int[] blocks, float? p, int reduction) -> Tensor[]");

  // weights[i][~masks[i]] = 0, in place.
  m.def("fold(Tensor(a!)[] weights, Tensor[] masks) -> ()");
  // The same with a mask for each unit. `blocks` as for unit_scores.
  m.def("fold_units(Tensor(a!)[] weights, Tensor[] unit_masks, int[] blocks) -> ()");

  // weights[i][~masks[i]], in the order of the flat index, and zeros in its place; and the way back, in place. Empty
  // tensors become what is parked, so that nobody can be interrupted between the zeros and a result.
  m.def("park(Tensor(a!)[] weights, Tensor[] masks, Tensor(b!)[] parked) -> ()");
  m.def("unpark(Tensor(a!)[] weights, Tensor[] masks, Tensor[] parked) -> ()");

  // Each tensor as bits (uint8, least significant first: mask, or not zero) and the values whose bit is set, in the
  // order of the flat index; -0.0 is zero unless negative_zeros. And the way back, as rows of counts[i] elements or
  // into tensors that are there.
  m.def("pack(Tensor[] tensors, Tensor[] masks, bool negative_zeros) -> (Tensor[], Tensor[])");
  m.def("unpack(Tensor[] bits, Tensor[] values, int[] counts) -> Tensor[]");
  m.def("unpack_into(Tensor[] bits, Tensor[] values, Tensor(a!)[] out) -> ()");
  // How many bits are set in each row of bytes, int64 [n]. For the CPU.
  m.def("count_bits(Tensor[] rows) -> Tensor");

  // CRC-32 of bytes in a row, as zlib's, after what had the CRC-32 `start`. For the CPU.
  m.def("crc32(Tensor bytes, int start) -> int");

  // A weight's lists of what is not zero, in a layout of sparse_layout.h: how many entries each has, of some rows;
  // and the lists of these rows, in place, of a weight of so many rows of which the first is first_row.
  m.def("count_sparse(Tensor weight, int layout, int blocks) -> Tensor");
  m.def(
      "fill_sparse(Tensor weight, int layout, Tensor offsets, int rows, int first_row, Tensor(a!) values, "
      "Tensor(b!) index) -> ()");
  // What is wrong with lists (SparseFault of kernels/pack_sparse.h), int64 [1]; and the dense weight, without scale.
  m.def("check_sparse(Tensor values, Tensor index, Tensor offsets, int layout, int rows, int columns) -> Tensor");
  m.def("unpack_sparse(Tensor values, Tensor index, Tensor offsets, int layout, int rows, int columns) -> Tensor");
  // activation(input W^T + bias) with W in lists, in float32; results are of the input's dtype. activation:
  // Activation of kernels/sparse_panel.h. No derivative.
  m.def(
      "sparse_linear(Tensor input, Tensor values, Tensor index, Tensor offsets, Tensor? scale, Tensor? bias, "
      "int layout, int out_features, int activation) -> Tensor");

  // Per weight whether something that its mask drops was found not to be zero: by a look at a few elements, others at
  // each turn, or by reading all (turn -1). int64 [n], on the CPU.
  m.def("probe(Tensor[] weights, Tensor[] masks, int turn) -> Tensor");

  // A new tensor, laid out as the weight: where(mask, weight, 0).
  m.def("mask_weight(Tensor weight, Tensor mask) -> Tensor");

  // masks[i] = unit_masks[i], each repeated over its unit.
  m.def("expand(Tensor[] unit_masks, int[] blocks, Tensor(a!)[] masks) -> ()");

  // The columns of a block of SparseGPT (float32 or float64 matrices, columns one after the other): weight and sums
  // become what is left and what went, the mask is given or, with of > 0, keeps `keep` of each `of` columns and none
  // that it dropped before.
  m.def(
      "sparsegpt_block(Tensor(a!) weight, Tensor(b!) sums, Tensor factor, Tensor(c!) mask, int keep, int of) -> ()");

  // How many elements have magnitude bits in each of so many intervals of 2^shift from low on, and last, how many
  // are below: int64 [bins + 1]. For the CPU.
  m.def("magnitude_counts(Tensor weight, int low, int shift, int bins) -> Tensor");

  // Number of elements equal to zero (False for bool) in each tensor: int64 [n].
  m.def("count_zeros(Tensor[] tensors) -> Tensor");

  // weight times gates, one per logit, each shared by a block of neighbours. Sampled with noise from (seed, stream,
  // index of the logit), or deterministic without a seed. rule: GateRule in gate_math.h.
  m.def(
      "gate(Tensor weight, Tensor logits, Tensor? seed, int stream, int rule, float beta, float gamma, float zeta) "
      "-> Tensor");
  m.def(
      "gate_out(Tensor weight, Tensor logits, Tensor? seed, int stream, int rule, float beta, float gamma, float "
      "zeta, "
      "Tensor(a!) out) -> ()");

  // Gradients of gate with respect to weight and logits, with the noise drawn again; one that is not wanted is empty.
  m.def(
      "gate_backward(Tensor grad, Tensor weight, Tensor logits, Tensor? seed, int stream, int rule, float beta, "
      "float gamma, float zeta, bool for_weight, bool for_logits) -> (Tensor, Tensor)");
  m.def(
      "gate_backward_out(Tensor grad, Tensor weight, Tensor logits, Tensor? seed, int stream, int rule, float beta, "
      "float gamma, float zeta, Tensor(a!) grad_weight, Tensor(b!) grad_logits) -> ()");

  // The uniform numbers that gates of this size draw: float32.
  m.def("gate_noise(Tensor seed, int[] size, int stream) -> Tensor");

  // Per tensor, the number of logits above 0 or the sum of sigma(logit + shift): float64 [n].
  m.def("gate_penalty(Tensor[] logits, bool hard, float shift) -> Tensor");
  // grad[i] * sigma'(logits[i] + shift) for each tensor.
  m.def("gate_penalty_backward(Tensor grad, Tensor[] logits, float shift) -> Tensor[]");
}
