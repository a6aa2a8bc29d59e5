"""Calls between the two processes of a test run: the program in one sandbox, the tests in another.

The program is never asked whether it is right. The tests call it over a pipe, and what comes back is a plain value
that is rebuilt from JSON (`serialization`): it has the standard library's own `==`, whatever the program did to its
own. The program's process holds no test, no expected value and no verdict, so that nothing it reads, patches or prints
can forge one, nor can an early exit.

Both processes run as one program does, one at a time:
- Lists, dicts and other mutable containers that both hold are kept equal (`containers`).
- An object of the program's classes is a proxy in the tests: an instance of a class of the same name, base classes and
  special methods, each of which is a remote call (`proxies`). Values of derived built-in classes are built-in, too.
- Exceptions are raised on the other side, generators are iterated over and coroutines are awaited (`awaitables`).
- What the tests put in place of the standard streams, `input` and `print` is used by the program (`streams`).

No operator hands an expected value to the program, or lets it decide about one: `total(2) == 4`, `total(2) - 4` and
`4 in total(2)` see the plain or built-in value of `total(2)`, and fail where it has none. The exception is an object
that the test makes by the name of a class, `Money(3) == 3`, as the operators of the class are what is tested
(`class_names`); it ends where the program hands that object out again.

Limits that a test has in a single process, too:
- Where it compares two objects of the program's classes, or applies an operator to an object that it made by the name
  of a class, the program's operators decide.
- Where it calls a method of the program's object with the expected value, the method decides.
- Where it uses a name that neither it nor Python defines, the program defines it.
- Where it derives the expected value from an argument after the call, the program may have changed that argument.
- Where it checks no value, every program passes that raises no error.
- A program that knows the tests can return the expected values without computing them.
"""
