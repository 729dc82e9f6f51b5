// Tensors of the device and of the CPU that share memory.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include "memory.h"

namespace pretend {

using at::Tensor;
using c10::Device;
using c10::DeviceType;
using c10::DispatchKey;
using c10::DispatchKeySet;

inline const DispatchKeySet kCuda(DispatchKey::CUDA), kCpu(DispatchKey::CPU);

inline bool on_device(const Tensor& t) {
  return t.defined() && t.device().type() == DeviceType::CUDA;
}

// A tensor with the dtype, shape and strides of `like` on another storage.
inline Tensor with_storage(c10::Storage storage, const Tensor& like, DispatchKeySet keys) {
  auto made = at::detail::make_tensor<at::TensorImpl>(std::move(storage), keys, like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

// The memory of `storage`, which lives as long as the result, on another device.
inline c10::Storage shared(const c10::Storage& storage, Device device, c10::Allocator* allocator,
                           c10::DeleterFnPtr end) {
  void* context = new c10::Storage(storage);
  c10::DataPtr data(storage.mutable_data(), context, end, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, true};
}

inline c10::Storage to_cpu(const c10::Storage& storage) {
  return shared(storage, DeviceType::CPU, c10::GetCPUAllocator(),
                [](void* context) { delete static_cast<c10::Storage*>(context); });
}

// Memory that a CPU kernel allocated counts as the device's from now on.
inline c10::Storage to_device(const c10::Storage& storage, c10::DeviceIndex index) {
  if (storage.nbytes() > 0) hold(storage.mutable_data(), storage.nbytes(), false);
  return shared(storage, Device(DeviceType::CUDA, index), &device_memory, [](void* context) {
    auto* kept = static_cast<c10::Storage*>(context);
    if (kept->nbytes() > 0) let_go(kept->mutable_data());
    delete kept;
  });
}

inline Tensor cpu_alias(const Tensor& t) {
  return on_device(t) ? with_storage(to_cpu(t.storage()), t, kCpu) : t;
}

// From the first to past the last byte of a tensor.
inline std::pair<uintptr_t, uintptr_t> extent(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  auto size = static_cast<int64_t>(t.itemsize());
  auto begin = reinterpret_cast<uintptr_t>(t.storage().data()) +
      static_cast<uintptr_t>(t.storage_offset() * size);
  return {begin, begin + static_cast<uintptr_t>((last + 1) * size)};
}

// Bytes behind a tensor; an expanded dimension has no memory of its own.
inline int64_t bytes_of(const Tensor& t) {
  auto bytes = static_cast<int64_t>(t.itemsize());
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.stride(d) != 0 || t.size(d) == 0) bytes *= t.size(d);
  return bytes;
}

// One kernel on the current stream.
class Launch {
 public:
  explicit Launch(std::string name) : name_(std::move(name)) {}
  void reads(const Tensor& t) { add(t, reads_); }
  void writes(const Tensor& t) { add(t, writes_); }
  void moves(int64_t bytes) { bytes_ += bytes; }
  int64_t bytes() const { return bytes_; }
  // Count it and look for races; return its time on the stream.
  uint64_t go() {
    Locked locked;
    uint64_t time = launch_time();
    books().launches += 1;
    books().bytes_moved += bytes_;
    for (auto [begin, end] : reads_) use(begin, end, false, name_, time);
    for (auto [begin, end] : writes_) use(begin, end, true, name_, time);
    return time;
  }

 private:
  using Extents = std::vector<std::pair<uintptr_t, uintptr_t>>;
  void add(const Tensor& t, Extents& extents) {
    if (!on_device(t)) return;
    extents.push_back(extent(t));
    bytes_ += bytes_of(t);
  }
  std::string name_;
  Extents reads_, writes_;
  int64_t bytes_ = 0;
};

inline void record_stream(const Tensor& t, int64_t stream) {
  Locked locked;
  Block* block = on_device(t) ? block_at(t.storage().data()) : nullptr;
  if (block != nullptr) block->recorded.insert(stream);
}

}  // namespace pretend
