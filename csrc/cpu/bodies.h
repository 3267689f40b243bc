// All kernels of one instruction set. Included once per instruction set, inside its namespace,
// which has a select_*.h and what squares.h asks for before it.
#include "block.h"
#include "histogram.h"
#include "programs.h"
#include "squares.h"

const Kernels kKernels = {sparse_adam, gather_grad, scatter,
                          add_delta,   fisher_diag, score_histogram};
