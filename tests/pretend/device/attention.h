// Fused attention without a mask: one kernel each way. All other attention is plain operations.
#pragma once

#include <ATen/SDPBackend.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>

#include "tensors.h"

namespace pretend {

class FusedAttention {
 public:
  FusedAttention(const char* name, const Tensor& query)
      : launch_(name), index_(query.device().index()) {}
  ~FusedAttention() { launch_.go(); }
  Tensor in(const Tensor& t) {
    launch_.reads(t);
    return cpu_alias(t);
  }
  Tensor out(const Tensor& t) {
    Tensor made = with_storage(to_device(t.storage(), index_), t, kCuda);
    launch_.writes(made);
    return made;
  }

 private:
  at::AutoDispatchBelowAutograd below_;
  Launch launch_;
  c10::DeviceIndex index_;
};

using Scale = std::optional<double>;

inline std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor>
attention(const Tensor& q, const Tensor& k, const Tensor& v, double dropout, bool causal, bool,
          Scale scale) {
  FusedAttention fused("attention", q);
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      fused.in(q), fused.in(k), fused.in(v), dropout, causal, std::nullopt, scale);
  Tensor seed = fused.out(at::detail::empty_cpu({0}, at::kLong));
  Tensor offset = fused.out(at::detail::empty_cpu({0}, at::kLong));
  return {fused.out(out), fused.out(logsumexp), Tensor(), Tensor(), q.size(2), k.size(2), seed,
          offset, Tensor()};
}

inline std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt,
    double dropout, bool causal, const Tensor&, const Tensor&, Scale scale) {
  FusedAttention fused("attention_backward", q);
  auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      fused.in(gradient), fused.in(q), fused.in(k), fused.in(v), fused.in(out),
      fused.in(logsumexp), dropout, causal, std::nullopt, scale);
  return {fused.out(dq), fused.out(dk), fused.out(dv)};
}

inline int64_t choose_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& mask, double dropout, bool, Scale,
                                bool) {
  bool masked = mask.has_value() && mask->defined();
  auto rows = [](const Tensor& t) { return t.dim() == 4 && t.numel() > 0 && t.stride(3) == 1; };
  bool fused = !masked && dropout == 0.0 && rows(q) && rows(k) && rows(v) &&
      q.size(1) == k.size(1) && k.size(1) == v.size(1) && q.size(3) == v.size(3);
  return static_cast<int64_t>(fused ? at::SDPBackend::flash_attention : at::SDPBackend::math);
}

}  // namespace pretend
