// Memory for results whose size is known only when they are there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace pyprune {

// Grows in blocks, each as large as all before, so that what is stored stays where it is.
class Arena {
 public:
  char* reserve(int64_t bytes) {
    if (end_ - next_ < bytes) {
      const int64_t size = std::max(bytes, std::min(int64_t{1} << 20, total_));
      total_ += size;
      blocks_.push_back(std::make_unique_for_overwrite<char[]>(size));
      next_ = blocks_.back().get();
      end_ = next_ + size;
    }
    return next_;
  }
  void keep(int64_t bytes) { next_ += (bytes + 7) / 8 * 8; }
  void clear() {
    blocks_.clear();
    next_ = end_ = nullptr;
    total_ = 0;
  }

 private:
  std::vector<std::unique_ptr<char[]>> blocks_;
  char *next_ = nullptr, *end_ = nullptr;
  int64_t total_ = 0;  // bytes of all blocks
};

}  // namespace pyprune
