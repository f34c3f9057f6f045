// Choosing nested codes by their effect on the outputs: the inner loops of quant/calibrate.py, which explains them.
//
// Contract: pointers are to memory that the caller owns; nothing is allocated. Targets are float32 [widths][rows], each
// row `stride` floats after the one before; `group_size` columns of it are touched.
#pragma once

#include <cstdint>

namespace moert {

struct Nesting {
  const int* widths;     // ascending, at most 8 of them
  const float* weights;  // what an error at each width counts
  int num_widths;
  int group_size;  // at most 128
  int64_t rows, stride;
};

// Scales [widths][rows] that suit a group's targets; the error of column k counts column_weights[k].
void fit_scales(const Nesting& n, const float* targets, const float* column_weights, float* scales);

// Chooses the codes of a group, column after column. Where `before` (what the columns are now, as targets) is 0, what
// is left of a column's targets moves those of the later columns; else a column's change moves those of all others:
// target[k] -= moved[j] * coupling[j][k], with coupling[k][k] 0. Writes codes (rows `code_stride` bytes apart) and
// `moved` [widths][rows][group_size].
void choose_codes(const Nesting& n, const float* targets, const float* before, const float* coupling,
                  const float* scales, uint8_t* codes, int64_t code_stride, float* moved);

}  // namespace moert
