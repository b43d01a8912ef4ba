; The tiny guest as a disk that a BIOS boots: 1 MiB, because SeaBIOS reads no AHCI or virtio disk that
; is shorter than one cylinder of 16 heads and 63 sectors.
;
;   sector 0        boot sector: loads the core through INT 13h
;   sectors 1-9     data, what the commands `1`-`9`, `r` and `w` work on; sector 1 holds a mark
;   sector 16 on    the core

%include "layout.inc"

bits 16
org 0x7c00

DISK_BYTES          equ 0x100000
CORE_SECTOR         equ 16
BOOT_SIGNATURE      equ 0xaa55
READ_EXTENDED       equ 0x42            ; INT 13h: read by LBA, drive in DL as the BIOS left it

image:
    jmp 0:boot                          ; some BIOSes come here as 07c0:0000
boot:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, STACK_TOP
    sti
    mov si, core_packet
    mov ah, READ_EXTENDED
    int 0x13
    jc .unreadable
    mov bl, BOOTED_FROM_DISK
    jmp 0:CORE_ADDRESS
.unreadable:
    hlt                                 ; no banner comes; whoever waits for it has a deadline
    jmp .unreadable

align 4, db 0
core_packet:                            ; INT 13h extensions: disk address packet
    db 16, 0
    dw CORE_SECTORS
    dw CORE_ADDRESS, 0
    dq CORE_SECTOR

    times 510 - ($ - $$) db 0
    dw BOOT_SIGNATURE

    db "KVMSEC-DISK-0001"
    times CORE_SECTOR * SECTOR_BYTES - ($ - $$) db 0

core_image:
    incbin "core.bin"
core_image_end:
CORE_SECTORS        equ (core_image_end - core_image + SECTOR_BYTES - 1) / SECTOR_BYTES

    times DISK_BYTES - ($ - $$) db 0
