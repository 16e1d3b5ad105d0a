// crc32: of pieces of memory at the same time, put together: a state is moved over n bytes by a product with x^(8n).
#include "kernels/crc32.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../check.h"
#include "capability.h"
#include "crc32_polynomial.h"
#include "parallel.h"

namespace pyprune {
namespace {

constexpr int64_t kPiece = int64_t{1} << 18;
constexpr uint32_t kAheadOfPiece = crc32_power(8 * kPiece);

int64_t crc32(const torch::stable::Tensor bytes, int64_t start) {
  STD_TORCH_CHECK(bytes.is_contiguous() && bytes.element_size() == 1, "expected bytes in a row");
  check_on_cpu(bytes);
  const auto* const data = static_cast<const uint8_t*>(bytes.const_data_ptr());
  const int64_t count = bytes.numel(), pieces = (count + kPiece - 1) / kPiece;
  std::vector<uint32_t> states(pieces);
  const auto bytes_of = [&](int64_t piece) { return std::min(kPiece, count - piece * kPiece); };
  share_tasks(pieces, count / 4, [&, run = PYPRUNE_KERNEL(crc32_of)](int64_t piece, int64_t) {
    states[piece] = run(data + piece * kPiece, bytes_of(piece), 0);
  });
  uint32_t state = ~static_cast<uint32_t>(start);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const bool whole = bytes_of(piece) == kPiece;
    state = crc32_product(state, whole ? kAheadOfPiece : crc32_power(8 * bytes_of(piece))) ^ states[piece];
  }
  return static_cast<uint32_t>(~state);
}

}  // namespace
}  // namespace pyprune

STABLE_TORCH_LIBRARY_IMPL(pyprune, CPU, m) {
  m.impl("crc32", TORCH_BOX(&pyprune::crc32));
}
