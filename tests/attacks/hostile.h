/* What an attack is made of: see main.c for how one is ordered and how it answers. */
#ifndef HOSTILE_H
#define HOSTILE_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* An attack runs in a child of its own, which ends with its answer. `words` are its arguments,
 * with a null at their end; the table in table.py gives as many as the attack takes. */
struct attack {
    const char *name;
    void (*act)(char **words);
};

extern const struct attack other_instance[], host_files[], privileges[], network[], resources[],
    launcher[];

/* The arguments that the program was started with. */
extern char **given;

/* Say that it worked, with the evidence, and end. */
void succeeded(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
/* Say that `what` failed with the errno that is set, and end. */
void refused(const char *what) __attribute__((noreturn));
/* Say that it failed in a way that has no errno, as one upper-case word, and end. */
void refused_as(const char *word, const char *what) __attribute__((noreturn));
/* End with a refusal if a call failed; else its result. */
#define must(call) must_be(#call, (long)(call))
long must_be(const char *what, long result);
/* Say that one is ready for what whoever ordered the attack does meanwhile; wait for its word. */
void ready(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Become another program that reports over the same line what it then is: see `report_ids`. */
char **as_reporter(void);
/* Copy this very program to a path, as something that may be executed. */
int copy_of_itself(const char *path, int mode);
/* The next open descriptor above `number` that is neither the line's nor a pipe; -1 at the end. */
int next_descriptor(int number);

#endif
