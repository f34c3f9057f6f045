// Choosing codes of the trellis code by their effect on the outputs: the inner loop of quant/trellis_search.py, which
// explains it.
//
// Contract: pointers are to memory that the caller owns; nothing is allocated. Runs on the calling thread.
#pragma once

#include <cstdint>

namespace moert {

constexpr int kMostColumns = 64;

struct TrellisBlock {
  int bits;              // of a code: 2 or 1
  int columns;           // at most kMostColumns, one after the other in the ring
  int kept;              // the first of them, of which codes are chosen; the others are only looked at
  int64_t rows, stride;  // of the targets: each row `stride` floats after the one before
  const float* table;    // levels by window, as in quant/trellis.py
  const float* weights;  // what an error of a column counts [columns]
  // What is left of column j of a target moves the later ones: target[k] -= left * coupling[j * columns + k].
  const float* coupling;
  const float* scales;  // [rows]
};

// A second width that the same codes must suit: it will add one of the levels -far, -near, near, far (in units of the
// scale) to each, and what is left of its own targets then counts `weight` times.
struct LookAhead {
  const float* targets;  // nullptr: there is none
  float near, far, weight;
};

constexpr uint8_t kAnyState = 255;

// Writes codes (rows `code_stride` bytes apart) and what they leave of the targets, as they were moved by then, [rows]
// [kept]; `ahead_left` the same of the second width. starts, ends [rows]: the states, the last codes with the newest at
// the top, before the block and behind the columns kept; where one is kAnyState it takes the one that was found best. An
// end can be asked for only where all columns are kept.
using ChooseTrellis = void(const TrellisBlock& block, const float* targets, const LookAhead& ahead, uint8_t* starts,
                           uint8_t* ends, uint8_t* codes, int64_t code_stride, float* left, float* ahead_left);

}  // namespace moert
