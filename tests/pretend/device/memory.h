// Memory of the device and pinned memory, both from the host's heap; and who uses which bytes when.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <unordered_set>

#include "order.h"

namespace pretend {

inline thread_local c10::DeviceIndex current_device = 0;

// One launch's use of the bytes [begin, end).
struct Use {
  uintptr_t begin, end;
  int64_t stream;
  uint64_t time;
  bool writes;
  std::string by;
};

struct Block {
  size_t size;
  bool pinned;
  int64_t home;  // the stream it was allocated on: freed memory may be used there again at once
  std::vector<Use> uses;
  std::unordered_set<int64_t> recorded;  // streams that its owner told the allocator of
};

inline std::map<uintptr_t, Block>& blocks() {
  static auto* all = new std::map<uintptr_t, Block>();
  return *all;
}

inline Block* block_at(const void* address) {
  auto place = reinterpret_cast<uintptr_t>(address);
  auto next = blocks().upper_bound(place);
  if (next == blocks().begin()) return nullptr;
  auto& [begin, block] = *std::prev(next);
  return place < begin + block.size ? &block : nullptr;
}

constexpr size_t kGrain = 512;  // as CUDA's caching allocator
inline int64_t whole_grains(size_t size) {
  return static_cast<int64_t>((size + kGrain - 1) / kGrain * kGrain);
}

inline void hold(void* data, size_t size, bool pinned) {
  Locked locked;
  blocks()[reinterpret_cast<uintptr_t>(data)] = Block{size, pinned, current_stream, {}, {}};
  if (pinned) return;
  books().bytes_held += whole_grains(size);
  books().peak_bytes = std::max(books().peak_bytes, books().bytes_held);
}

inline void let_go(void* data) {
  Locked locked;
  auto place = blocks().find(reinterpret_cast<uintptr_t>(data));
  if (place == blocks().end()) return;
  const Block& block = place->second;
  const Clock& home = order().streams.at(static_cast<size_t>(block.home));
  for (const Use& use : block.uses) {
    if (use.stream == block.home || home.knows(use.stream, use.time) ||
        order().host.knows(use.stream, use.time) || block.recorded.count(use.stream))
      continue;
    found(kLifetime, "memory of stream " + std::to_string(block.home) + " is freed while " + use.by +
                         " on stream " + std::to_string(use.stream) +
                         " may still use it, without record_stream");
    break;
  }
  if (!block.pinned) books().bytes_held -= whole_grains(block.size);
  blocks().erase(place);
}

// Note a use by the launch at `time` of the current stream, and tell of those that race with it.
inline void use(uintptr_t begin, uintptr_t end, bool writes, const std::string& by, uint64_t time) {
  Block* block = begin == end ? nullptr : block_at(reinterpret_cast<void*>(begin));
  if (block == nullptr) return;
  const Clock& now = order().streams.at(static_cast<size_t>(current_stream));
  std::vector<Use> open;
  for (Use& other : block->uses) {
    if (order().host.knows(other.stream, other.time)) continue;  // over for everybody
    bool meets = other.begin < end && begin < other.end;
    if (meets && (writes || other.writes) && !now.knows(other.stream, other.time))
      found(kRace, by + (writes ? " writes" : " reads") + " on stream " +
                       std::to_string(current_stream) + " what " + other.by +
                       (other.writes ? " writes" : " reads") + " on stream " +
                       std::to_string(other.stream) + ", with no event between them");
    bool replaced = begin <= other.begin && other.end <= end && (writes || !other.writes) &&
        now.knows(other.stream, other.time);
    if (!replaced) open.push_back(std::move(other));
  }
  open.push_back({begin, end, current_stream, time, writes, by});
  block->uses = std::move(open);
}

inline bool is_pinned(const void* address) {
  Locked locked;
  Block* block = block_at(address);
  return block != nullptr && block->pinned;
}

inline void release(void* data) {
  let_go(data);
  std::free(data);
}

class HostMemory final : public c10::Allocator {
 public:
  explicit HostMemory(bool pinned) : pinned_(pinned) {}
  c10::DataPtr allocate(size_t size) override {
    auto device = pinned_ ? c10::Device(c10::DeviceType::CPU)
                          : c10::Device(c10::DeviceType::CUDA, current_device);
    void* data = nullptr;
    if (size > 0) {
      auto needed = static_cast<size_t>(whole_grains(size));
      TORCH_CHECK(posix_memalign(&data, kGrain, needed) == 0, "the host is out of memory");
      if (!pinned_) std::memset(data, 0xff, needed);  // NaN: what is read before it is written shows
      hold(data, size, pinned_);
    }
    return {data, data, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }

 private:
  bool pinned_;
};

inline HostMemory device_memory(false), pinned_memory(true);

}  // namespace pretend
