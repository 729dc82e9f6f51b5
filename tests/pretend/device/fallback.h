// The kernel of every operator that has one for the CPU: check devices, let the CPU's kernel work on
// the same memory, and note what was read and written.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <unordered_map>

#include "tensors.h"

namespace pretend {

using torch::jit::Stack;

enum Trait : unsigned {
  kNone = 0,
  kWaits = 1,       // the host learns a value or a size
  kOverwrites = 2,  // the tensor it is called on is not read
  kPicks = 4,       // of its first tensor it reads only as much as its result holds
  kPuts = 8,        // of its first tensor it writes only as much as its last one holds
  kIndices = 16,    // takes a list of indices, which may lie on the CPU or be masks
  kNoKernel = 32,   // changes only sizes and strides
  kMixes = 64,      // lets CPU tensors without dimensions in, as TensorIterator does
};

inline const std::unordered_map<std::string, unsigned>& known_traits() {
  static const auto* table = [] {
    auto* made = new std::unordered_map<std::string, unsigned>();
    auto set = [made](unsigned trait, std::initializer_list<const char*> names) {
      for (const char* name : names) (*made)[name] |= trait;
    };
    set(kWaits, {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "bincount",
                 "unique_consecutive", "unique_dim_consecutive", "repeat_interleave", "equal",
                 "histc", "_linalg_check_errors", "segment_reduce"});
    set(kOverwrites, {"fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_",
                      "exponential_"});
    set(kPicks, {"index", "index_select", "embedding", "gather", "take"});
    set(kPuts, {"index_put_", "_index_put_impl_", "index_copy_", "index_fill_", "scatter_"});
    set(kIndices, {"index", "index_put_", "_index_put_impl_", "index_put", "_unsafe_index"});
    set(kNoKernel, {"view", "as_strided", "_reshape_alias", "unfold", "alias", "detach"});
    return made;
  }();
  return *table;
}

inline std::unordered_map<std::string, unsigned>& mixing() {  // filled from torch's own table
  static auto* names = new std::unordered_map<std::string, unsigned>();
  return *names;
}

inline std::string short_name(const c10::FunctionSchema& schema) {
  const std::string& name = schema.name();
  return name.rfind("aten::", 0) == 0 ? name.substr(6) : name;
}

inline unsigned traits_of(const c10::FunctionSchema& schema) {
  thread_local std::unordered_map<const c10::FunctionSchema*, unsigned> cache;
  auto [place, fresh] = cache.emplace(&schema, kNone);
  if (fresh) {
    auto name = short_name(schema), full = name;
    if (!schema.overload_name().empty()) full += "." + schema.overload_name();
    if (auto it = known_traits().find(name); it != known_traits().end()) place->second = it->second;
    if (mixing().count(full)) place->second |= kMixes;
  }
  return place->second;
}

[[noreturn]] inline void refuse(const std::string& message) {
  found(kDevice, message);
  TORCH_CHECK(false, message);
}

// Replace every tensor in a value by `f(tensor, its place in a list or -1)`.
template <typename F>
void replace_tensors(c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    value = f(value.toTensor(), -1);
  } else if (value.isTensorList()) {
    c10::List<Tensor> made;
    for (const Tensor& t : value.toTensorVector()) made.push_back(f(t, made.size()));
    value = made;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> made;
    for (const auto& t : value.toOptionalTensorVector())
      made.push_back(t ? std::optional<Tensor>(f(*t, made.size())) : std::nullopt);
    value = made;
  }
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op_(op), schema_(op.schema()), stack_(*stack), traits_(traits_of(op.schema())),
        launch_(short_name(op.schema())) {}

  void run() {
    find_device();
    check_devices();
    lower();
    for (const std::string& why : waits_) host_waits(why);
    {
      at::AutoDispatchBelowAutograd below;
      op_.redispatchBoxed(kCpu, &stack_);
    }
    take_over_resized();
    raise();
    if (!has(kNoKernel) && touched_ > 0) launch_.go();
  }

 private:
  bool has(Trait trait) const { return (traits_ & trait) != 0; }
  size_t num_arguments() const { return schema_.arguments().size(); }
  c10::IValue& argument(size_t i) { return stack_[stack_.size() - num_arguments() + i]; }
  bool written(size_t i) const {
    const auto* alias = schema_.arguments()[i].alias_info();
    return alias != nullptr && alias->isWrite();
  }

  // That of its first device tensor, or the one it is asked to make tensors on.
  void find_device() {
    for (size_t i = num_arguments(); i-- > 0;) {
      auto value = argument(i);
      replace_tensors(value, [&](const Tensor& t, int64_t) {
        if (on_device(t)) device_ = t.device();
        return t;
      });
    }
    for (size_t i = 0; i < num_arguments(); ++i) {
      if (!argument(i).isDevice() || argument(i).toDevice().type() != DeviceType::CUDA) continue;
      Device asked = argument(i).toDevice();
      if (!device_) device_ = asked.has_index() ? asked : Device(DeviceType::CUDA, current_device);
      argument(i) = Device(DeviceType::CPU);
    }
  }

  void check_devices() {
    if (!device_) return;
    for (size_t i = 0; i < num_arguments(); ++i) {
      auto value = argument(i);
      replace_tensors(value, [&](const Tensor& t, int64_t place) {
        if (t.defined() && t.device().type() != DeviceType::Meta && t.device() != *device_)
          check(t, i, place);
        return t;
      });
    }
  }

  void check(const Tensor& t, size_t i, int64_t place) {
    if (t.device().type() == DeviceType::CPU) {
      if (has(kIndices) && place >= 0) {
        if (t.numel() > 0) waits_.push_back(short_name(schema_) + " with indices on the CPU");
        return;
      }
      if (has(kMixes) && t.dim() == 0 && !written(i)) return;
    }
    if (has(kMixes))
      refuse("Expected all tensors to be on the same device, but found at least two devices, " +
             device_->str() + " and " + t.device().str() + "! (" + short_name(schema_) + ")");
    refuse("Expected all tensors to be on the same device, but got " +
           schema_.arguments()[i].name() + " is on " + t.device().str() +
           ", different from other tensors on " + device_->str() +
           " (when checking argument in method wrapper_CUDA_" + short_name(schema_) + ")");
  }

  // Replace device tensors by CPU tensors on their memory.
  void lower() {
    bool waits = has(kWaits);
    for (size_t i = 0; i < num_arguments(); ++i) {
      bool writes = written(i);
      bool reads = !schema_.arguments()[i].is_out() && !(writes && has(kOverwrites));
      if (schema_.arguments()[i].name() == "unsafe" && argument(i).toBool()) waits = false;
      replace_tensors(argument(i), [&](const Tensor& t, int64_t place) {
        if (!on_device(t)) return t;
        if (has(kIndices) && place >= 0 && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte))
          waits_.push_back(short_name(schema_) + " with a mask");
        note(t, reads, writes);
        return lowered(t, writes);
      });
    }
    if (waits) waits_.push_back(short_name(schema_));
  }

  void note(const Tensor& t, bool reads, bool writes) {
    touched_ += t.numel();
    int64_t before = launch_.bytes();
    if (reads) launch_.reads(t);
    if (writes) launch_.writes(t);
    if (tensors_.empty() && (has(kPicks) || has(kPuts))) launch_.moves(before - launch_.bytes());
    last_bytes_ = bytes_of(t);
  }

  Tensor lowered(const Tensor& t, bool writes) {
    auto [place, fresh] = tensors_.try_emplace(t.unsafeGetTensorImpl());
    if (fresh) {
      auto* impl = t.storage().unsafeGetStorageImpl();
      auto storage = storages_.find(impl);
      if (storage == storages_.end()) {
        storage = storages_.emplace(impl, to_cpu(t.storage())).first;
        raised_storages_.emplace(storage->second.unsafeGetStorageImpl(), t.storage());
      }
      place->second = with_storage(storage->second, t, kCpu);
      raised_.emplace(place->second.unsafeGetTensorImpl(), t);
    }
    if (writes) written_.emplace_back(t, place->second);
    return place->second;
  }

  // Where the CPU's kernel gave a tensor that it writes another size or memory.
  void take_over_resized() {
    for (auto& [device, cpu] : written_) {
      auto* storage = device.storage().unsafeGetStorageImpl();
      if (cpu.storage().data() != storage->data()) {
        auto grown = to_device(cpu.storage(), device_->index());
        storage->set_data_ptr(grown.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()));
      }
      storage->set_nbytes(cpu.storage().nbytes());
      if (cpu.sizes() != device.sizes() || cpu.strides() != device.strides() ||
          cpu.storage_offset() != device.storage_offset()) {
        device.unsafeGetTensorImpl()->set_sizes_and_strides(cpu.sizes(), cpu.strides(),
                                                            cpu.storage_offset());
        note(device, false, true);
      }
    }
  }

  // Replace the CPU results by device tensors: given ones, views of given ones, or new ones.
  void raise() {
    size_t count = schema_.returns().size();
    int64_t new_bytes = 0;
    for (size_t i = 0; i < count; ++i)
      replace_tensors(stack_[stack_.size() - count + i], [&](const Tensor& t, int64_t) {
        if (!t.defined() || t.device().type() != DeviceType::CPU || !t.has_storage()) return t;
        if (auto same = raised_.find(t.unsafeGetTensorImpl()); same != raised_.end())
          return same->second;
        auto* impl = t.storage().unsafeGetStorageImpl();
        auto storage = raised_storages_.find(impl);
        bool fresh = storage == raised_storages_.end();
        if (fresh) {
          auto index = device_ ? device_->index() : current_device;
          storage = raised_storages_.emplace(impl, to_device(t.storage(), index)).first;
        }
        Tensor made = with_storage(storage->second, t, kCuda);
        if (fresh) {
          launch_.writes(made);
          new_bytes += bytes_of(made);
          touched_ += made.numel();
        }
        return made;
      });
    if (has(kPicks)) launch_.moves(new_bytes);
    if (has(kPuts)) launch_.moves(last_bytes_);
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  Stack& stack_;
  unsigned traits_;
  Launch launch_;
  std::optional<Device> device_;
  std::vector<std::string> waits_;
  int64_t touched_ = 0, last_bytes_ = 0;  // elements; of the last argument
  std::unordered_map<at::TensorImpl*, Tensor> tensors_, raised_;
  std::unordered_map<at::StorageImpl*, c10::Storage> storages_, raised_storages_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

inline void compute(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  Call(op, stack).run();
}

// The CPU's kernel works on the device tensor itself: it touches only sizes and strides.
inline void reshape(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  at::AutoDispatchBelowAutograd below;
  op.redispatchBoxed(kCpu, stack);
}

}  // namespace pretend
