// The head's entry points for the binding.
#pragma once
#include <string>

#include "head.h"
#include "isas.h"

namespace fastpref {

const HeadKernels& head_kernels(const std::string& isa);

// out (n,) = hidden[t] . weight[targets[t]], summed in fp64; weight_column and weight_fp32 as in Scoring
void label_dots(const void* hidden, const void* weight, const int64_t* targets, double* out, int64_t n, int64_t hidden_size,
                int64_t weight_stride, Dtype dtype, int threads, int64_t weight_column = 1, bool weight_fp32 = false);

}  // namespace fastpref
