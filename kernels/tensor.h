// Plain views of activations: what the backend's ops read and write. Nothing here owns memory.
#pragma once

#include <cassert>
#include <cstdint>
#include <type_traits>

namespace espalier {

// A row-major fp32 matrix view: `rows` rows of `cols` contiguous values, `stride` values apart.
template <typename T>
struct MatrixView {
  T* data = nullptr;
  int rows = 0;
  int cols = 0;
  int64_t stride = 0;  // values from one row to the next, >= cols

  MatrixView() = default;
  MatrixView(T* d, int r, int c) : data(d), rows(r), cols(c), stride(c) {}
  MatrixView(T* d, int r, int c, int64_t s) : data(d), rows(r), cols(c), stride(s) {}
  template <typename U>
    requires(!std::is_same_v<U, T> && std::is_convertible_v<U*, T*>)
  MatrixView(const MatrixView<U>& other)  // NOLINT: a view of T reads as a view of const T
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  T* row(int r) const {
    assert(r >= 0 && r < rows);
    return data + r * stride;
  }
};

using Matrix = MatrixView<float>;
using ConstMatrix = MatrixView<const float>;

}  // namespace espalier
