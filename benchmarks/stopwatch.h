/* SPDX-License-Identifier: Apache-2.0
 *
 * stopwatch.h - how long something takes that is over in nanoseconds.
 */
#ifndef STOPWATCH_H
#define STOPWATCH_H

double seconds_now(void); /* since some moment */

/* Seconds of one run: the best of some rounds, each of as many runs as fill some milliseconds. */
double best_seconds(void (*run)(const void *), const void *what);

#endif
