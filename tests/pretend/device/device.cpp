// A pretend CUDA device for CPU builds of torch: registers memory, streams and operators.
// README.md says what it is for. Loaded before torch, which looks its CUDA hooks up when imported.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "attention.h"
#include "fallback.h"
#include "transfers.h"

namespace pretend {
namespace {

c10::DeviceIndex device_count = 1;

Device here() { return {DeviceType::CUDA, current_device}; }

void synchronize_stream(int64_t stream) {
  Locked locked;
  found(kWait, "Stream.synchronize");
  host_learns_stream(stream);
}

void synchronize_event(const Clock* event) {
  Locked locked;
  if (event == nullptr || order().host.covers(*event)) return;  // returns at once
  found(event->covers(clock_of_all()) ? kWait : kLate, "Event.synchronize");
  host_learns(*event);
}

void synchronize_device() {
  Locked locked;
  found(kWait, "torch.cuda.synchronize");
  host_learns(clock_of_all());
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream(int64_t id, Device device) {
    return c10::Stream(c10::Stream::UNSAFE, device, id);
  }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return here(); }
  void setDevice(Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = here();
    uncheckedSetDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count; }
  c10::Stream getStream(Device device) const override { return stream(current_stream, device); }
  c10::Stream getDefaultStream(Device device) const override { return stream(0, device); }
  c10::Stream getNewStream(Device device, int) const override {
    return stream(new_stream(), device);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override {
    return stream(new_stream(), device);
  }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream, next.id()), next.device());
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    delete static_cast<Clock*>(*event);
    *event = new Clock(clock_of(stream.id()));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event != nullptr) make_wait(stream.id(), *static_cast<Clock*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock*>(event);
  }
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize_stream(stream.id());
  }
  void synchronizeEvent(void* event) const override {
    synchronize_event(static_cast<Clock*>(event));
  }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize_device(); }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(DeviceType::CUDA, &device_memory)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  c10::DeviceIndex current_device() const override { return pretend::current_device; }
  c10::DeviceIndex getCurrentDevice() const override { return pretend::current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { pretend::current_device = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(pretend::current_device, index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  Device getDeviceFromPtr(void*) const override { return here(); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
  void deviceSynchronize(c10::DeviceIndex) const override { synchronize_device(); }
};

using Optional = std::optional<Device>;

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             Optional device, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_memory, kCuda, c10::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     Optional device, std::optional<bool> pin) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_memory, kCuda,
                                           c10::dtype_or_default(dtype));
}

Tensor& set_to_nothing(Tensor& self) {
  c10::Storage none(c10::Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory,
                    true);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(none));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef{0}, at::IntArrayRef{1}, 0);
  return self;
}

void record_stream_of(Tensor& self, c10::Stream stream) { record_stream(self, stream.id()); }

// What does not come through the dispatcher. `bytes` below 0: those of the tensors.
void launch(at::TensorList reads, at::TensorList writes, std::string_view name, int64_t bytes) {
  Launch one{std::string(name)};
  for (const Tensor& t : reads) one.reads(t);
  for (const Tensor& t : writes) one.writes(t);
  if (bytes >= 0) one.moves(bytes - one.bytes());
  one.go();
}

// Give every operator with a CPU kernel one for the device; after torch is imported.
void register_operators(const std::vector<std::string>& mixing_names) {
  static std::vector<c10::RegistrationHandleRAII> handles;
  for (const auto& name : mixing_names) mixing().emplace(name, 0);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    bool ours = op && op->hasSchema() && name.name.rfind("aten::", 0) == 0 &&
        !op->hasKernelForDispatchKey(DispatchKey::CUDA) &&
        (op->hasKernelForDispatchKey(DispatchKey::CPU) ||
         name.name.rfind("aten::_foreach_", 0) == 0);
    if (ours)
      handles.push_back(dispatcher.registerImpl(
          name, DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunction<&compute>(),
          std::nullopt, nullptr, "pretend"));
  }
}

const Clock* event_at(int64_t handle) { return reinterpret_cast<const Clock*>(handle); }

std::vector<int64_t> counts() {
  Locked locked;
  const Books& b = books();
  return {b.launches, b.bytes_moved, b.bytes_held, b.peak_bytes};
}

void reset_peak() {
  Locked locked;
  books().peak_bytes = books().bytes_held;
}

}  // namespace
}  // namespace pretend

namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", pretend::Hooks)
}  // namespace at

namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &pretend::choose_attention)
}  // namespace at::native

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&pretend::compute>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &pretend::empty);
  m.impl("empty_strided", &pretend::empty_strided);
  m.impl("copy_", &pretend::copy_);
  m.impl("_local_scalar_dense", &pretend::item);
  m.impl("record_stream", &pretend::record_stream_of);
  m.impl("set_", &pretend::set_to_nothing);
  for (const char* name : {"view", "as_strided", "_reshape_alias", "unfold", "view_as_real",
                           "view_as_complex", "resize_", "set_.source_Storage",
                           "set_.source_Storage_storage_offset", "set_.source_Tensor",
                           "is_set_to"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&pretend::reshape>());
  m.impl("_scaled_dot_product_flash_attention", &pretend::attention);
  m.impl("_scaled_dot_product_flash_attention_backward", &pretend::attention_backward);
}

// What the Python side calls, as torch.ops.pretend.
TORCH_LIBRARY(pretend, m) {
  using namespace pretend;
  m.def("register_operators(str[] mixing) -> ()", &register_operators);
  m.def("set_device_count(int n) -> ()",
        [](int64_t n) { device_count = static_cast<c10::DeviceIndex>(n); });
  m.def("device() -> int", []() -> int64_t { return current_device; });
  m.def("set_device(int index) -> ()",
        [](int64_t index) { current_device = static_cast<c10::DeviceIndex>(index); });
  m.def("new_stream() -> int", &new_stream);
  m.def("stream() -> int", []() -> int64_t { return current_stream; });
  m.def("set_stream(int stream) -> ()", [](int64_t stream) { current_stream = stream; });
  m.def("event(int stream) -> int", [](int64_t stream) {
    return reinterpret_cast<int64_t>(new Clock(clock_of(stream)));
  });
  m.def("free_event(int event) -> ()", [](int64_t event) { delete event_at(event); });
  m.def("wait_event(int event, int stream) -> ()",
        [](int64_t event, int64_t stream) { make_wait(stream, *event_at(event)); });
  m.def("synchronize_event(int event) -> ()",
        [](int64_t event) { synchronize_event(event_at(event)); });
  m.def("query_event(int event) -> ()", [](int64_t event) { host_learns(*event_at(event)); });
  m.def("synchronize_stream(int stream) -> ()", &synchronize_stream);
  m.def("synchronize() -> ()", &synchronize_device);
  m.def("wait(str why) -> ()", [](std::string_view why) { host_waits(std::string(why)); });
  m.def("refuse(str why) -> ()", [](std::string_view why) { refuse(std::string(why)); });
  m.def("cpu_alias(Tensor t) -> Tensor", &cpu_alias);
  m.def("launch(Tensor[] reads, Tensor[] writes, str name, int bytes=-1) -> ()", &launch);
  m.def("record_stream(Tensor t, int stream) -> ()", &record_stream);
  m.def("counts() -> int[]", &counts);
  m.def("reset_peak() -> ()", &reset_peak);
}

extern "C" void pretend_listen(pretend::Listener listener) { pretend::books().listener = listener; }
