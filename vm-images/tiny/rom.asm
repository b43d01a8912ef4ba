; The tiny guest as firmware (`-bios tiny.rom`): 64 KiB, the least that QEMU takes.
;
; There is no BIOS below it. The processor starts at the reset vector, 16 bytes below the end, in
; real mode; a far jump there makes CS a plain F000. The rest copies the core into RAM, because a
; ROM has no room for variables.

%include "layout.inc"

bits 16
org 0

ROM_SEGMENT         equ 0xf000
ROM_BYTES           equ 0x10000
RESET_VECTOR        equ 0xfff0

start:
    cli
    cld
    mov ax, ROM_SEGMENT
    mov ds, ax
    xor ax, ax
    mov es, ax
    mov si, core_image
    mov di, CORE_ADDRESS
    mov cx, (core_image_end - core_image) / 2
    rep movsw
    mov bl, BOOTED_FROM_ROM
    jmp 0:CORE_ADDRESS

align 16
core_image:
    incbin "core.bin"
    align 2, db 0
core_image_end:

    times RESET_VECTOR - ($ - $$) db 0xff
    jmp ROM_SEGMENT:start
    times ROM_BYTES - ($ - $$) db 0
