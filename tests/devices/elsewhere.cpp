// A device that is not the CPU, for machines that have no other: its tensors lie in the host's memory, and the CPU runs
// each operator on copies of them. It refuses what a GPU refuses, tensors of two devices in one operator, and can refuse
// to have a value read back, which a GPU would have to be waited for.

#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_cpu_dispatch.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/unfold_cpu_dispatch.h>
#include <ATen/ops/view_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

using at::Tensor;

constexpr auto kElsewhere = c10::DeviceType::PrivateUse1;
const c10::Device elsewhere_0{kElsewhere, 0};

// ---- what is read back to the host

bool reading_is_an_error = false;

void note_read(const char* how) {
  TORCH_CHECK(!reading_is_an_error, "a value is read back to the host: ", how);
}

struct Unnoted {  // what the CPU does in place of the device
  const bool was_an_error = reading_is_an_error;
  Unnoted() { reading_is_an_error = false; }
  ~Unnoted() { reading_is_an_error = was_an_error; }
};

// ---- what torch expects of a device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kElsewhere;
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, elsewhere_0); }
  c10::DeviceType type() const override { return kElsewhere; }
  c10::Device exchangeDevice(c10::Device) const override { return elsewhere_0; }
  c10::Device getDevice() const override { return elsewhere_0; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Allocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::malloc(bytes) : nullptr;
    return {data, data, &std::free, elsewhere_0};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }
};
Allocator allocator;
REGISTER_ALLOCATOR(kElsewhere, &allocator)

struct Generator : at::CPUGeneratorImpl {
  Generator() {
    device_ = elsewhere_0;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
};

// ---- operators that it has itself: memory, copies and views of it

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, c10::dtype_or_default(dtype));
}

Tensor on_host(const Tensor& tensor) {  // the same memory
  if (tensor.device().type() != kElsewhere) return tensor;
  void* data = const_cast<void*>(static_cast<const void*>(tensor.unsafeGetTensorImpl()->data()));
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(data, tensor.sizes(), tensor.strides(), [tensor](void*) {}, options);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel() == 0 && to.numel() == 0) return to;
  if (from.device().type() == kElsewhere && to.device().type() != kElsewhere) note_read("a copy");
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (!to.sizes().equals(from.sizes())) at::native::resize_(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

c10::Scalar local_scalar(const Tensor& tensor) {
  note_read("item()");
  return on_host(tensor).item();
}

Tensor as_strided(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(tensor, size, stride, offset);
}

Tensor view(const Tensor& tensor, c10::SymIntArrayRef size) { return at::cpu::view_symint(tensor, size); }

Tensor reshape_alias(const Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::cpu::_reshape_alias_symint(tensor, size, stride);
}

Tensor unfold(const Tensor& tensor, int64_t axis, int64_t size, int64_t step) {
  return at::cpu::unfold(tensor, axis, size, step);
}

Tensor& set_storage(Tensor& tensor, at::Storage storage) { return at::cpu::set_(tensor, storage); }

Tensor& set_strided(Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                    c10::SymIntArrayRef stride) {
  return at::cpu::set__symint(tensor, storage, offset, size, stride);
}

const Tensor& resize(const Tensor& tensor, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(size), format);
}

// ---- operators that the CPU runs

void check_device(const Tensor& tensor, const std::string& name) {
  const bool is_number = tensor.defined() && tensor.device().is_cpu() && tensor.dim() == 0;
  TORCH_CHECK(!tensor.defined() || is_number || tensor.device().type() == kElsewhere,
              "Expected all tensors to be on the same device, but ", name, " got one on ", tensor.device(),
              " beside others on ", elsewhere_0);
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> reading{"aten::equal", "aten::nonzero", "aten::masked_select"};
  static const std::set<std::string> indexing{"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& name = op.schema().name();
  if (reading.count(name)) note_read(name.c_str());
  for (size_t place = stack->size() - op.schema().arguments().size(); place < stack->size(); ++place) {
    auto& value = (*stack)[place];
    const auto& argument = op.schema().arguments()[place - (stack->size() - op.schema().arguments().size())];
    if (argument.name() == "generator") {  // the CPU draws from one of its own, which this device's tells
      auto generator = value.isNone() ? default_generator() : value.toGenerator();
      if (generator.device().type() == kElsewhere) {
        std::lock_guard<std::mutex> lock(generator.mutex());
        value = at::detail::createCPUGenerator(static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->random64());
      }
    }
    if (indexing.count(name)) continue;  // places may lie on the host
    if (value.isTensor()) check_device(value.toTensor(), name);
    if (value.isTensorList())
      for (const Tensor& each : value.toTensorVector()) check_device(each, name);
  }
  Unnoted unnoted;
  at::native::cpu_fallback(op, stack);
}

Tensor moved(const Tensor& tensor) {
  Unnoted unnoted;
  return tensor.defined() ? tensor.to(elsewhere_0) : tensor;
}

Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, c10::IntArrayRef stride,
                   c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
                   int64_t groups) {
  for (const Tensor& each : {x, weight, bias.value_or(Tensor())}) check_device(each, "convolution");
  std::optional<Tensor> added;
  if (bias && bias->defined()) added = on_host(*bias);
  return moved(at::convolution(on_host(x), on_host(weight), added, stride, padding, dilation, transposed,
                               output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> wanted) {
  const std::vector<int64_t> channels{gradient.size(1)};
  const auto [of_x, of_weight, of_bias] =
      at::convolution_backward(on_host(gradient), on_host(x), on_host(weight), at::OptionalIntArrayRef(channels), stride,
                               padding, dilation, transposed, output_padding, groups, wanted);
  return {moved(of_x), moved(of_weight), moved(of_bias)};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(  // its schema does not tell that it writes into the statistics
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& variance, bool training, double momentum,
    double epsilon) {
  const auto lent = [](const std::optional<Tensor>& tensor) {
    check_device(tensor.value_or(Tensor()), "native_batch_norm");
    return tensor && tensor->defined() ? std::optional<Tensor>(on_host(*tensor)) : std::nullopt;
  };
  const auto [made, of_batch, inverse] = at::native_batch_norm(on_host(x), lent(weight), lent(bias), lent(mean),
                                                               lent(variance), training, momentum, epsilon);
  return {moved(made), moved(of_batch), moved(inverse)};
}

int64_t kind_of_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                          std::optional<double>, bool) {
  return 0;  // of separate operators
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", unfold);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_strided);
  library.impl("resize_", resize);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
  library.impl("native_batch_norm", batch_norm);
  library.impl("_fused_sdp_choice", kind_of_attention);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(prelu, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss_nd, fp32)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(batch_norm, fp32)  // the CPU has no backward for half of it
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register_hooks", [] {
    static Hooks hooks;
    at::RegisterPrivateUse1HooksInterface(&hooks);
  });
  module.def("default_generator", &default_generator);
  module.def("set_reading_is_an_error", [](bool is_one) { reading_is_an_error = is_one; });
}
