// Copies between the device and the host, and when the host can see and touch what they move.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <list>

#include "tensors.h"

namespace pretend {

// A copy that the host has not waited for. One to pinned memory puts its values there at the wait
// and not before; one from pinned memory may still be reading, so its source must not change.
struct Transfer {
  int64_t stream;
  uint64_t time;
  Tensor pinned;
  Tensor values;  // to be put there, or those the source had
  bool arrives;

  void put() const {
    std::memcpy(pinned.mutable_data_ptr(), values.const_data_ptr(), values.nbytes());
  }
  bool unchanged() const {
    return std::memcmp(pinned.const_data_ptr(), values.const_data_ptr(), values.nbytes()) == 0;
  }
};

inline std::list<Transfer>& transfers() {
  static auto* open = new std::list<Transfer>();
  return *open;
}

inline void transfers_end() {
  for (auto it = transfers().begin(); it != transfers().end();) {
    if (!order().host.knows(it->stream, it->time)) {
      ++it;
      continue;
    }
    if (it->arrives) {
      it->put();
    } else if (!it->unchanged()) {
      found(kRace, "the host changed pinned memory (" + std::to_string(it->values.nbytes()) +
                       " bytes) while a copy to the device could still read it");
    }
    it = transfers().erase(it);
  }
}

inline void copy_on_cpu(const Tensor& to, const Tensor& from) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("aten::copy_", "")
                       .typed<Tensor&(Tensor&, const Tensor&, bool)>();
  at::AutoDispatchBelowAutograd below;
  Tensor target = to;
  op.redispatch(kCpu, target, from, false);
}

inline Tensor snapshot(const Tensor& t) {
  Tensor made = at::detail::empty_cpu(t.sizes(), t.scalar_type());
  copy_on_cpu(made, cpu_alias(t));
  return made;
}

inline void copy_to_pinned(const Tensor& pinned, const Tensor& from, uint64_t time) {
  // An own tensor on its memory: the caller may change the shape of his.
  Tensor target = with_storage(pinned.storage(), pinned, kCpu);
  Tensor values = snapshot(from);
  Locked locked;
  transfers().push_back({current_stream, time, target, values, true});
}

inline void copy_from_pinned(const Tensor& to, const Tensor& pinned, uint64_t time) {
  Locked locked;
  // The device reads what earlier copies of its own have put there, whatever the host can see.
  auto [begin, end] = extent(pinned);
  const Clock now = clock_of(current_stream);
  for (const Transfer& other : transfers()) {
    auto [low, high] = extent(other.pinned);
    if (other.arrives && low < end && begin < high && now.knows(other.stream, other.time))
      other.put();
  }
  copy_on_cpu(cpu_alias(to), pinned);
  Tensor source = with_storage(pinned.storage(), pinned, kCpu);
  transfers().push_back({current_stream, time, source, snapshot(pinned), false});
}

// Like CUDA's: only copies of equal dtype to or from pinned memory can leave the host alone.
inline Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  if (self.is_same(src) || self.numel() == 0) return self;
  Launch launch("copy_");
  launch.reads(src);
  launch.writes(self);
  uint64_t time = launch.go();
  if (on_device(self) && on_device(src)) {
    copy_on_cpu(cpu_alias(self), cpu_alias(src));
    return self;
  }
  const Tensor& host = on_device(self) ? src : self;
  bool pinned = is_pinned(host.storage().data());
  bool plain = self.scalar_type() == src.scalar_type() && host.is_contiguous();
  if (non_blocking && pinned && plain) {
    if (on_device(src)) {
      copy_to_pinned(self, src, time);
    } else {
      copy_from_pinned(self, src, time);
    }
    return self;
  }
  std::string what = on_device(src) ? "copy to the host" : "copy to the device";
  what += !pinned ? ", pageable memory" : non_blocking ? ", converted on the host" : ", blocking";
  host_waits(what);
  copy_on_cpu(cpu_alias(self), cpu_alias(src));
  return self;
}

inline at::Scalar item(const Tensor& self) {
  Launch launch("item");
  launch.reads(self);
  launch.go();
  host_waits("item");
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("aten::_local_scalar_dense", "")
                       .typed<at::Scalar(const Tensor&)>();
  at::AutoDispatchBelowAutograd below;
  return op.redispatch(kCpu, cpu_alias(self));
}

}  // namespace pretend
